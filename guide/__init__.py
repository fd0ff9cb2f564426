"""The guide: how a small multimodal model works, chapter by chapter. It begins in 00-map.md."""
