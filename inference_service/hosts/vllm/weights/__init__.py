"""The weights of a vLLM engine: files mapped and page-locked ahead, and put into the live model."""
