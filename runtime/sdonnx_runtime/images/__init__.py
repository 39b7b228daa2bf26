"""Image preprocessing: resizing, masks, crops, edges."""
