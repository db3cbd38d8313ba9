"""The world model: latent states of observations, predictions, and their uncertainty."""
