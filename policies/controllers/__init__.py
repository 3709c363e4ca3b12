"""What each replica should run, by one idea a file; ``base`` states what a controller is."""
