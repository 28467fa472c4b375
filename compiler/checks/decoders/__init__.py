"""Times a decoder's prompts and steps beside other engines, each in a process of its own."""
