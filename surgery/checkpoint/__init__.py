"""Models in and out of directories: safetensors only, written aside and renamed, the same bits when loaded."""
