"""What a fine-tuning technique is (`Method`), where it acts (`Site`), and what it makes (`Adapter`)."""
