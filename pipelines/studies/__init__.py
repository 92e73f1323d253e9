"""Questions that people ask about VAEs, one file each."""
