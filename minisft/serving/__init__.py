"""A model and its adapters behind OpenAI's HTTP interface: what is asked, who computes, how answers look on the wire."""
