"""What the training regimes score in few-shot segmentation, and what they cost."""
