//! Lets macOS resolve the names of Python when the module is loaded; other systems do so anyway.

fn main() {
    pyo3_build_config::add_extension_module_link_args();
}
