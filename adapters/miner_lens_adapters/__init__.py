"""TransformerLens adapters and modality layouts, one file per model family."""
