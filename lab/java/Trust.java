import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.security.KeyStore;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;

/** Makes the certificates that the image trusts (PEM) a store that Java reads: FROM TO. */
public class Trust {
    public static void main(String[] arguments) throws Exception {
        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(null, null);
        int number = 0;
        try (FileInputStream in = new FileInputStream(arguments[0])) {
            for (Certificate one : CertificateFactory.getInstance("X.509").generateCertificates(in)) {
                store.setCertificateEntry("c" + number++, one);
            }
        }
        try (FileOutputStream out = new FileOutputStream(arguments[1])) {
            store.store(out, "changeit".toCharArray());
        }
    }
}
