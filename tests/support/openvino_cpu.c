/* A library of an execution provider: OpenVINO's plugin, which is told that this machine's CPU is Intel's.

   The plugin lists its CPU device for Intel's CPUs alone, and OpenVINO runs on others as well. PLUGIN is its path. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { TYPE = 307, VENDOR_ID = 308, FUNCTIONS = 512 }; /* of OrtApi: HardwareDevice_Type, HardwareDevice_VendorId */
enum { CPU = 0, INTEL = 0x8086 };

typedef struct {
  const void *(*get_api)(uint32_t);
  const char *(*get_version)(void);
} Base; /* OrtApiBase */
typedef int (*Type)(const void *);
typedef uint32_t (*VendorId)(const void *);
typedef void *(*Create)(const char *, const Base *, const void *, void **, size_t, size_t *);
typedef void *(*Release)(void *);

static const Base *base;
static const void *functions[FUNCTIONS];
static VendorId known_vendor;

static void *find(const char *name) {
  static void *library;
  if (!library) library = dlopen(PLUGIN, RTLD_NOW | RTLD_LOCAL);
  return library ? dlsym(library, name) : NULL;
}

static uint32_t vendor(const void *device) {
  return ((Type)functions[TYPE])(device) == CPU ? INTEL : known_vendor(device);
}

static const void *get_api(uint32_t version) {
  const void *api = base->get_api(version);
  if (api && !known_vendor) {
    memcpy(functions, api, sizeof functions);
    known_vendor = (VendorId)functions[VENDOR_ID];
    functions[VENDOR_ID] = (const void *)vendor;
  }
  return api ? functions : NULL;
}

static const char *get_version(void) { return base->get_version(); }

void *CreateEpFactories(const char *name, const Base *given, const void *log, void **factories, size_t most, size_t *count) {
  static const Base changed = {get_api, get_version};
  Create create = (Create)find("CreateEpFactories");
  base = given;
  *count = 0;
  return create ? create(name, &changed, log, factories, most, count) : NULL;
}

void *ReleaseEpFactory(void *factory) { return ((Release)find("ReleaseEpFactory"))(factory); }
