"""How fast a decoder reads prompts and takes steps, beside other engines: each in a process of its own."""
