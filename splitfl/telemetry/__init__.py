"""What a run says about itself: events in one file, and the display and the report derived from them."""
