"""In which form does a provider run attention fastest? The rules of `helpers.fuse` come from it."""
