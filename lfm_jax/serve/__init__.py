"""An HTTP server with the API of OpenAI over the engine; needs `lfm_jax[serve]`."""
