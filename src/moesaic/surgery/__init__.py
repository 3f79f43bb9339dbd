"""Surgery: from one model to another without training it anew."""
