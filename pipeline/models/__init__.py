"""Models in Hugging Face layout: loaded, saved, cut, merged."""
