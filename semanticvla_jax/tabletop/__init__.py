"""The embedded tabletop: its tasks, physics, pictures, expert, demonstrations and auxiliary losses."""
