"""What a user may write: Hydra YAML files and the schema that checks them."""
