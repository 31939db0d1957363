"""What the files of a checkpoint or an adapter mean. Pure: reads no file and no bucket."""
