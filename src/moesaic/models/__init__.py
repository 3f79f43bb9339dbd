"""Reference models, registered with transformers: `AutoModelForCausalLM` knows them after `import moesaic`."""
