"""What an update, a plan, the whole loop cost here: ``latentplan bench``."""
