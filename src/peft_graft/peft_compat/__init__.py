"""Hold every private name of PEFT, transformers and torch that this package leans on."""
