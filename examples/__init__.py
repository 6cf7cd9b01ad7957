"""What mechdiff leaves behind, used in other libraries."""
