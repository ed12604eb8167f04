"""The algorithms of federated adaptive-rank fine-tuning: no files, no CLI, no printing."""
