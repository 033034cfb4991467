"""Text from the trained model, over the split."""
