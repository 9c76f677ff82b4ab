"""Model families of Hugging Face: config.json and tensor names, both ways. No torch."""
