"""Vision-language policies: prompts, box codecs, generation, loading, and the embedded tiny model."""
