"""Where expert bytes live: read expert e of layer l without loading the rest; atomic writing."""
