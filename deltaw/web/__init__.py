"""An OpenAI-compatible server over the engine: what is asked over HTTP, and how answers look there."""
