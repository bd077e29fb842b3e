"""How the embedded model is made: a world, its stories, a tokenizer, a trainer, and the scores."""
