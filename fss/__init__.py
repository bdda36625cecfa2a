"""Few-shot segmentation: training and evaluation with Singular Value Fine-tuning."""

__version__ = "0.1.0"
