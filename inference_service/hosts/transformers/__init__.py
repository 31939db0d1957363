"""The host that serves with transformers: generation/ runs the model, openai/ is the API."""
