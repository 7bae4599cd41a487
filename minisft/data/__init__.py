"""Files and chats to token ids: what is read, rendered, masked and reported."""
