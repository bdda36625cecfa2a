"""What fine-tuning costs: raced against its peers, on a GPU, and in few-shot segmentation."""
