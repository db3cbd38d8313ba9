"""The world model: pixels and vectors in, latent states, predictions and uncertainty out."""
