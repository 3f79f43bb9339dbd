"""Edit: other routers, other experts, small trained parts in a trained model."""
