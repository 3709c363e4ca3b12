"""The Ray Serve application: replicas of vLLM that follow a policy actor, behind the OpenAI API."""
