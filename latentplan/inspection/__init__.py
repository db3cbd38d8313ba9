"""Films, charts and reports that show how an agent predicts, imagines and plans."""
