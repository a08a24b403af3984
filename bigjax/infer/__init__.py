"""What a trained model is used for: tokens after a prompt, and how likely a text is."""
