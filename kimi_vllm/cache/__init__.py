"""The life of a KDA state: what a slot is, who owns it, which ones are kept, and where a step reads and writes."""
