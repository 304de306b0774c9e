"""The M2N channel: rows of hidden states from M attention ranks to N FFN nodes, and their answers back."""
