"""What request bodies may say. A field is honoured, or refused by name: nothing is accepted and ignored."""
