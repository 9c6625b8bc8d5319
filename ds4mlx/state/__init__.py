"""The decode state of a sequence: its rows, how they are kept, and how it goes back."""
