"""The attention model, the engine that runs it and how it is trained. Needs PyTorch alone: no Ray, no web framework."""
