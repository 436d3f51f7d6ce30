"""What a streamed token and a request cost at the frontend, beside NVIDIA Dynamo, smg and vLLM's own server."""
