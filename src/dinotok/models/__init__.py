"""The models. Import them from `dinotok`; the modules' dotted paths are what saved pipelines name."""
