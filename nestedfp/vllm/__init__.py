"""The vLLM plugin: nested linear layers and a precision that changes from one step to the next."""
