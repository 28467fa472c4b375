// What TensorRT's Python bindings ask of the builder's and the parser's libraries, which the lean runtime lacks.
void* getBuilderPluginRegistry(int capability) { return 0; }
void* createInferBuilder_INTERNAL(void* logger, int version) { return 0; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void* logger, const char* space) { return 1; }
