"""What processes say to each other on the control channel: typed, frozen, bounded."""
