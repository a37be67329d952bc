"""Hold every private name of PEFT, transformers, torch and their like that this package leans on, checked at import."""
