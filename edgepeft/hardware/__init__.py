"""What this machine has: cards, processor, memory, disk, and which of its problems have a remedy."""
